"""The commands, a file each: what is typed -> a call of sltrain.api -> what is printed. Only they end the process."""
