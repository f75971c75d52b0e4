"""The method, from inputs and weights to row versions; no host and no file.

    inputs          who reads which tensor: input groups, and recording what they read
    clusters        the router: PCA, k-means, affine maps
    statistics      what calibration needs of an input group: samples, Hessians and means
    biases          what is added for each cluster, and how far it is shrunk
    masks, solvers  which weights go, and what the others become
    merge_tree, allocation, candidates    which versions are worth their bytes
    group           all of it, for one input group: `expand_group`
    neurons         Wasserstein distance and mapping difficulty

Needs torch; scikit-learn and scipy where clusters are made and ranks compared.
"""
