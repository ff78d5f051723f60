"""Turn SmolLM2's attention into Mamba-2 mixers: a hybrid that keeps part of its attention, or a pure Mamba model.

    python -m hybrid.distil WORK -o FOLDER --keep 15

`mixer` is what takes an attention's place, `student` the model around it, `distil` the three steps of the distillation,
`evaluate` says how well the result predicts text.
"""
