"""One process that holds expert columns and answers on its port."""
