"""The main job on real input: a byte-level language model with MoE layers, `python -m sonicmoe`.

data: the text. model: the network. train: one training, and what is measured on the way. layer: the speed of one 7B
layer on a Hopper GPU. report: table and plot.
"""
