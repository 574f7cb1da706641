"""Programs that try to get out of the sandbox, or around the verdict; driver.py runs them."""
