"""flaxcap: a high-throughput trainer for attention image captioners, in JAX.

Shape letters, used in array names (`feats_IPF`, `tokens_ICT`), einsums and docstrings:

    I  images in a batch               E  embedding width
    C  captions an image               H  hidden (recurrent state) width
    B  captions in a batch, I·C        A  attention width
    P  positions of the grid, 8·8      T  time: tokens in a caption
    F  feature width of the encoder    V  vocabulary
    N  rows of a store or data set     Y, X  image height, width
"""

__version__ = "0.1.0"
