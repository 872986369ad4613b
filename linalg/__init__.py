"""Pure tensor and array maths that formats share: Hessian factors, sampling, knapsacks."""
