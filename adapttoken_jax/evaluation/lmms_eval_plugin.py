"""What the entry point `lmms_eval.models` names: it tells lmms-eval where the model is, without loading it."""


def manifest():
    """lmms-eval's `ModelManifest` of this library."""
    from lmms_eval.models.registry_v2 import ModelManifest  # lmms-eval itself calls this

    return ModelManifest("adapttoken", chat_class_path="adapttoken_jax.evaluation.lmms_eval_model.AdaptToken")
