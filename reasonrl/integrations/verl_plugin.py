"""What verl loads as a plugin: it imports this module, in every worker, and calls nothing."""

from reasonrl.integrations.verl import register

NAMES = register()
