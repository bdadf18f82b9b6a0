"""What the vCenters have: one reader each, and the inventory that they write."""
