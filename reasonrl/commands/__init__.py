"""Commands beyond train and eval: each module's `add` puts its own under the parser."""
