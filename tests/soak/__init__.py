"""The soak: all that clients do, and do wrong, over and over, while the server's memory and files are watched."""
