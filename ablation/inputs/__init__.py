"""Open models and data: what a spec names becomes modules in eval mode and batches in a fixed order.

The map, in reading order (a file imports only files above it; those marked * are free of torch):

    folders *           where data sets, checkpoints and the cache are
    images *            image folders: classes and files
    mnist_and_cifar *   the files of MNIST, FashionMNIST, CIFAR10 and CIFAR100
    registered *        models and data sets that the operator has registered
    published *         ImageNet's classes; the files of torchvision's weights
    checkpoints *       which state dict of a file is meant
    classes *           which class of the model each class of the data is
    catalog *           names and facts of everything that can be asked for
    weights *           which weights are meant
    pictures            a picture file as RGB of 8 bits
    data                a data set by name, read as batches in a fixed order
    demo                the built-in model and its training
    models              a module by name, in eval mode
"""
