"""The stages of a job: each reads files, writes files and resumes after an interruption; `base.run_stage` runs them."""
