"""What a layer or a network costs: from the plan, as fvcore counts, as measured on a device."""
