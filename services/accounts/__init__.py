"""Accounts: principals, API keys, limits, usage and sealed secrets."""
