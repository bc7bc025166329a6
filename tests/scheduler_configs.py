"""Scheduler configs that several tests share."""

# Stable Diffusion 1.x, as its scheduler_config.json has it.
SD1 = dict(
  _class_name="DDIMScheduler",
  num_train_timesteps=1000,
  beta_start=0.00085,
  beta_end=0.012,
  beta_schedule="scaled_linear",
  steps_offset=1,
  set_alpha_to_one=False,
  clip_sample=False,
)
