"""The paper's claims: judged on a run by `judge.judge`, for each comparison of two models (`case.Case`)."""
