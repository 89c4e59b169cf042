"""What each operator makes of values of which something is known whatever the inputs are."""
