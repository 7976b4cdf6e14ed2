"""What runs inside the virtual environments of the peers: their servers, as their documentation would have them written."""
