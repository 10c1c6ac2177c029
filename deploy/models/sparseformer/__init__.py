"""SparseFormer: recognition with few tokens that look where they want (Gao et al., ICLR 2024, arXiv 2304.03768).

Two releases of the authors (showlab/sparseformer) have the same network under different names: ``imagenet/`` and the
library ``sparseformer/``. Ours are the library's. They normalise differently (``CONSTANTS``), which moves logits by
0.1: a checkpoint takes the constants of the release whose names it has, unless ``options.constants`` says otherwise.

    stem       conv 7x7/2, ReLU, max pool/2, each pixel normalised over its channels
    unit       attention; RoI adjustment; sampling + adaptive mixing; MLP       all pre-norm and residual
    focusing   one unit of that kind, several times with the same weights, on narrow tokens
    cortex     one more such unit on wide tokens, then plain transformer blocks; mean, norm, classifier

    RoI        centre += d_xy * size, size *= exp(d_size), from the token
    sampling   points in the RoI from the token, standardised over the points; bilinear from the stem's map
    mixing     GELU(M x + b) over channels, GELU(S x + b) over points, with M and S from the token; flatten; project

Deploy form, exact up to rounding:

* Tokens and RoIs do not know the image before the first sampling, so the first attention, RoIs, points and both
  matrices are constants; they join the batch at the first mixing.
* The three norms before RoI, points and mixing read the same tokens: one standardises, their gains go into the linears.
* The points' mean is taken off in the weights, RoIs are kept as centre and size in GridSample's -1..1.
* Mixing keeps channels before points, as they are sampled: M and S are generated transposed, the projection reordered.
* For TensorRT, heads of 4 to 12 channels are padded with zeros to 16, below which no fused attention kernel exists.

What is hard to export: coordinates need float32 in every precision, and a constant must not be expanded to the batch.

``network`` holds the training form, ``deploy`` what is exported, ``looking`` the pictures of where it looks, ``system``
variants, forms and checkpoint layouts.
"""

from deploy.models.sparseformer.system import SYSTEM

__all__ = ["SYSTEM"]
