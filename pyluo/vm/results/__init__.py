"""Results: the verdicts on tests, and how to read and write them as KTAP, JUnit, JSON and HTML."""
