"""Models behind an HTTP address: questions, answers, and the journal that asks nothing twice."""
