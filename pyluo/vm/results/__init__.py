"""Results: one model of a verdict, and what reads and writes it: KTAP, JUnit, JSON, the page."""
