"""Results: the model of a verdict, and its readers and writers: KTAP, JUnit, JSON and HTML."""
