"""What `scripts.replay_trace` runs: requests, tiers, the optimum and made-up scenarios."""
