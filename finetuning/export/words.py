"""What a proof says, in sentences: the command prints them, and the model card keeps them."""

from finetuning.export.proof import LARGEST_DIFFERENCE, AgainstPredictions, InPipeline, Proof


def sentences(proof: Proof, dtype: str, truncation: str) -> list[str]:
    """One or two sentences for each thing that was compared.

    Args:
        proof: what was compared.
        dtype: of the written weights.
        truncation: the run's ``--truncation``.
    """
    sample = "all" if proof.texts == proof.total else "a stratified sample of"
    held = f"{proof.texts:,} of {proof.total:,}" if proof.texts < proof.total else f"{proof.total:,}"
    found = [
        f"A fresh process loaded the folder without this suite and read the token ids of {sample} {held} held-out"
        f" texts. Its logits differ from the run's merged fp32 model by {proof.largest_difference:.1e} at most"
        f" (allowed: {LARGEST_DIFFERENCE:g})."
    ]
    if proof.dtype_difference is not None:
        found.append(
            f"Rounding the weights to {dtype} moved these logits by {proof.dtype_difference:.1e} at most and changed"
            f" the labels of {proof.dtype_changed:,} of {proof.texts:,} texts; the comparison above is with the rounded"
            f" weights."
        )
    found.append(_predictions_sentence(proof.predictions, proof.texts, proof.several))
    if proof.pipeline is not None:
        found.append(_pipeline_sentence(proof.pipeline, proof.texts, truncation, proof.several))
    if proof.onnx_difference is not None:
        found.append(f"onnxruntime's logits differ from the same reference by {proof.onnx_difference:.1e} at most.")
    return found


def _predictions_sentence(compared: AgainstPredictions, texts: int, several: bool) -> str:
    start = (
        f"The run stored its predictions in {compared.precision}. Its logits differ from the fp32 model's by"
        f" {compared.largest_difference:.1e} at most. The labels of {compared.changed:,} of {texts:,} texts changed."
    )
    if not compared.changed:
        return start
    margin = "distance of a changed label's logit from the threshold"
    margin = margin if several else "margin of a changed label, between its two highest logits,"
    return (
        f"{start} The {margin} was {compared.largest_margin:.1e} at most; {compared.precision} can move it by"
        f" {compared.rounding:.1e}."
    )


def _pipeline_sentence(compared: InPipeline, texts: int, truncation: str, several: bool) -> str:
    same = (
        f"A Transformers pipeline reads {compared.same_tokens:,} of {texts:,} texts as the run did, and gives them the"
        f" run's probabilities (largest difference {compared.largest_difference:.1e})."
    )
    if compared.same_tokens == texts:
        return same
    measure = "exact match" if several else "accuracy"
    reason = "it cuts long texts at their end, and the run kept their beginning and end" * (truncation == "head_tail")
    return (
        f"{same} It reads the others differently{': ' if reason else ''}{reason}. That changes the labels of"
        f" {compared.changed:,}: {measure} on these texts is {compared.accuracy:.2%} in a pipeline and"
        f" {compared.run_accuracy:.2%} with the run's tokens."
    )
