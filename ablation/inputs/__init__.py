"""Open models and data: what a spec names becomes modules in eval mode and batches in a fixed order.

The map, in reading order (a file imports only files above it; those marked * are free of torch):

    folders *           where data sets, checkpoints and the cache are
    images *            image folders: classes and files
    mnist_and_cifar *   the files of MNIST, FashionMNIST, CIFAR10 and CIFAR100
    registered *        models and data sets that the operator has registered
    catalog *           names and facts of everything that can be asked for
    data                a data set by name, read as batches in a fixed order
    demo                the built-in model and its training
    models              a module by name, in eval mode
"""
