"""For tests of agents and of Rethaw itself: a scripted model provider, a real server in a temporary place, crashes."""
