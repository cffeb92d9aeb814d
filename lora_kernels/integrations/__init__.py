"""What this package knows about other libraries; none of them is imported until it is used."""
