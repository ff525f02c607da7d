"""The swarm simulator and simulated ports."""
