"""What a long-running service needs on either side of the federation."""
