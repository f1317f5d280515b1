"""An experiment kit for LongNet: dilated attention and its rivals behind one interface, trained from recipe files."""

__version__ = "0.1.0"
