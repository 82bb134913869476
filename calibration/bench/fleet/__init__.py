"""Simulation of replicas of lvlm-serve behind a load balancer."""
