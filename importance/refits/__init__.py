"""What mending a cut is made of: the streams that are compared, layers' sums, routed experts, and what was found."""
