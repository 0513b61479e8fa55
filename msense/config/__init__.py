"""Settings of the jobs: one frozen, validated model per command."""
