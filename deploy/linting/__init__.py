"""Lint: what a runtime is known to refuse, or to run wrongly or slowly, told of an ONNX file before anything is built.

```
deploy/data/lint_rules.yaml --read_table--> Table                       the rules, as data: one entry a rule
"tensorrt==11.4"            --parse_goals--> Goal                       what the file is meant for
model.onnx                  --View.of-->    View                        nodes, inferred types, small constants
                 Rule.check --CHECKS-->     Hits                        a predicate over a View; most rules share one
                            --lint_file-->  deploy.records.LintRecord   findings by rule, errors and warnings by goal
```
"""
