"""One module per command, called as the command; its function ``command`` is what typer runs."""
