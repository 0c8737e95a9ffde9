"""What should survive any live update: what `pyluo vm matrix` and `bisect` run by themselves."""
