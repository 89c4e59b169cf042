"""What `fxopt.profile` is made of: rows and their tree, times, tables and pictures."""
