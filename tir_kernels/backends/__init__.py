"""The implementations behind the operators.

A backend is a module with these functions over plain tensors, already validated and on one device.
It knows nothing of autograd, dispatch or the other backends:

``unavailable_reason() -> str``
    Empty if the backend runs in this process, on some device, else why not and what to do about it.
``device_reason(device) -> str``
    Empty if it takes tensors on that device, of a backend that runs here; else why not. Two GPUs of
    a machine may have two answers.
``relevance(tokens, class_embeddings, norm_weight, norm_bias, norm_eps, proj, num_prefix_tokens)``
    (B, L, D), (G, C, E), (D,) or None, (D,) or None, float or None, (D, E) or None, int
    -> (B, C, N) float32. ``norm_eps=None``: no LayerNorm. ``proj=None``: E = D.
``token_weights(tokens, class_embeddings, norm_weight, norm_bias, norm_eps, proj, table, top_k,
num_prefix_tokens)``
    With ``table`` (C + 1,) float32 and ``top_k`` tokens selected per class, 0 <= top_k <= N
    -> weights (B, L) float32, counts (B, N) int32.
``attention_forward(query, key, value, weights, scale)``
    (B, H, L, d) three times, (B, L) float32, float -> output (B, H, L, d) contiguous in the type of
    the query, log_sum_exp (B, H, L) float32: log of the weighted sum of exponentials, -inf for rows
    that attend to nothing.
``attention_backward(grad_output, query, key, value, weights, output, log_sum_exp, scale,
needs_weights_grad)``
    -> grad_query, grad_key, grad_value (B, H, L, d) in the type of the query, and grad_weights
    (B, L) float32, which is empty, shape (0,), unless ``needs_weights_grad``.

``MAX_HEAD_DIM``
    The widest heads it takes; not asked of the reference, which takes all.

A backend whose attention kernels look weights up by themselves also has these; for the others they
are put together from those above:

``reweighted_forward(query, key, value, tokens, class_embeddings, norm_weight, norm_bias, norm_eps,
proj, table, top_k, num_prefix_tokens, scale)``
    -> output, log_sum_exp, counts.
``reweighted_backward(grad_output, query, key, value, counts, table, output, log_sum_exp, scale,
needs_weights_grad)``
    -> as attention_backward.

B, H, L, N, C >= 1 here: empty inputs are answered before a backend is asked. Query, key, value
and ``grad_output`` have unit stride in d and any other strides; tokens and class embeddings any.
"""
