"""Deploys the components: who runs where, the loop, the ledger, metrics, and the command line."""
