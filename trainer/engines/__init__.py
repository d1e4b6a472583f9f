"""Records a model's answers to fixed questions, and checks whether an engine gives the same."""
