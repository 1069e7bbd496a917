"""`adapttoken plan`: what a question costs on a TPU slice, from the real compiler, without weights and without a TPU.

    from adapttoken_jax import planning
    plan = planning.plan("qwen2.5-vl-7b", "v6e:2x4", "auto")
    plan.fits, plan.seconds["question"], plan.chip_hours(questions=2700)

`chips` knows the slices, `programs` the shapes of what is run, `compiler` compiles it, `hlo` reads what came out, and
`estimate` turns that into seconds and chooses the mesh.
"""

from adapttoken_jax.planning.estimate import Plan, ProgramEstimate, plan

__all__ = ["Plan", "ProgramEstimate", "plan"]
