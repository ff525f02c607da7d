"""What the backends share: sequences, the calls that steps become, and the port on top of both."""
