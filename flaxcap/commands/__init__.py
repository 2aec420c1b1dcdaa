"""The command line. Only here are stages joined."""
