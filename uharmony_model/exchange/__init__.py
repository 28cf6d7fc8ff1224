"""What may leave a site, and its checked wire form."""
