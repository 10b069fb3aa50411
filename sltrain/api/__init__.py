"""What the commands do, as functions: train, plan, load, evaluate, generate, export, report. They print nothing and end
nothing; `sltrain` itself offers the most used ones by name."""
