"""Scheduler configs that several tests share."""

# The noise schedule of Stable Diffusion 1.x, without the name of a sampler.
SD1_SCHEDULE = dict(
  num_train_timesteps=1000,
  beta_start=0.00085,
  beta_end=0.012,
  beta_schedule="scaled_linear",
  steps_offset=1,
  set_alpha_to_one=False,
)
# Stable Diffusion 1.x, sampled with DDIM.
SD1 = dict(SD1_SCHEDULE, _class_name="DDIMScheduler", clip_sample=False)
