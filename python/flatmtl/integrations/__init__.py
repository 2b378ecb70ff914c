"""FlatMTL inside training frameworks. Every module here is imported only when used, and needs nothing but torch to be:

`flatmtl.integrations.lightning`     Lightning, automatic and manual optimization
`flatmtl.integrations.accelerate`    Hugging Face Accelerate
`flatmtl.integrations.transformers`  Hugging Face Transformers' Trainer
`flatmtl.integrations.tensorboard`   the record of the steps, `optimizer.last`, in TensorBoard
"""
