"""What the servers share, `kcfi demo` and `kcfi serve`: limits, a guard, runs that end in time. Needs either extra."""
