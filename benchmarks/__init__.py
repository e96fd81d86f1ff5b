"""What a step costs, and where: the engine alone, gRPC alone, and rnnserve, in one table."""
