"""Options, budgets, Pareto sets, the knapsack and the study. Integers and records only, no tensors."""
