"""Entry scripts and the small packages behind them."""
